"""One file per operation: the custom ops with both backends, and the autograd functions over them. Use the public functions of rlkern."""
