"""Settings for every test: kernels run in Triton's interpreter where there is no GPU, and memory that nobody wrote holds NaN."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    torch.set_num_threads(1)  # small shapes; tests run in parallel processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"assert_accurate", "assert_same"} & vars(item.module).keys():
            item.add_marker("arithmetic")
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton":
            item.add_marker("interpreted")
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty gives NaN (integers: the largest value), so that an output that a kernel left unwritten fails loudly."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _interpreter_patches_once():
    """Triton's interpreter patches triton.language anew for every call of a device function, which is most of its time: once a launch will do."""
    if HAS_GPU:
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    patched: set[int] = set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_patched(self, *args, **kwargs):
        if id(self.fn.__globals__) in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(id(self.fn.__globals__))
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(GridExecutor, "__call__", launch_anew)
        m.setattr(InterpretedFunction, "__call__", call_patched)
        yield
