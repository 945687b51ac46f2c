"""A policy objective of one's own: a smooth clip, as fast as a built-in one, in the policy loss at every depth.

    loss = -A eps tanh((r - 1) / eps)

It has the slope of -r A at r = 1 and bends off smoothly where PPO's clip has a corner; eps is the configuration's ``clip_high``. On a GPU its Triton
form is inlined into the kernels, elsewhere its PyTorch form runs:

    python examples/own_surrogate.py
"""

import torch
import triton
import triton.language as tl

import rlkern as rk


@triton.jit
def smooth_clip(lp, old, log_r, A, o):
    r = tl.exp(log_r)
    gate = 2.0 * tl.sigmoid(2.0 * (r - 1.0) / o.high) - 1.0  # tanh((r - 1) / eps)
    # The loss, and its derivatives with respect to the log-prob (beside the ratio) and to the logarithm of the ratio.
    return -A * o.high * gate, tl.zeros_like(lp), -A * (1.0 - gate * gate) * r


def smooth_clip_torch(lp, old, log_r, A, o):
    return -A * o.high * torch.tanh((log_r.exp() - 1) / o.high)  # autograd makes the derivatives


rk.register_surrogate("smooth_clip", triton=smooth_clip, torch=smooth_clip_torch)
CONFIG = rk.PolicyLossConfig(surrogate="smooth_clip", clip_high=0.2, aggregation="seq-mean-token-mean")


def main() -> None:
    """Teach 8 x 16 tokens, from hidden states and a head, to be what is rewarded: tokens below half of the vocabulary."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vocabulary, hidden = 64, 1 + 0.1 * torch.randn(8, 16, 32, device=device)
    head = torch.zeros(vocabulary, 32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=2e-3)
    for step in range(10):
        with torch.no_grad():
            ids = torch.distributions.Categorical(logits=hidden @ head.t()).sample()
            old = rk.linear_token_logprobs(hidden, head, ids)
        rewards = (ids < vocabulary // 2).float()
        for _ in range(4):  # off-policy after the first
            out = rk.fused_linear_policy_loss(hidden, head, ids, old, rewards - rewards.mean(), config=CONFIG)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        print(f"step {step}: reward {float(rewards.mean()):.2f}, largest ratio {float(out.metrics['ratio_max']):.2f}")


if __name__ == "__main__":
    main()
