"""The road from a bare reward to GRPO, one run after another on the built-in task, and what each step of it bought.

    python examples/tutorial.py [--seeds 0 1 2] [--steps 25]

reward only          REINFORCE: -R log p                                  J = E[R]
+ value baseline     -(R - V) log p, V by a critic                        A = R - V
+ clipping           PPO's min(r A, clip(r) A)
+ reference KL       rewards less 0.05 KL from the initial model
GRPO                 no critic: the mean of a group in its place, the KL in the loss
... once a step      the first two again, with one update a step in place of eight

All start from the same warmed-up model, with the same seeds, the same number of completions a step, the same learning rate, and but for the last two
the same number of updates.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkern.trainers import runs, tutorial
from rlkern.trainers.grpo import GRPO, GRPOArguments
from rlkern.trainers.ppo import PPO, PPOArguments

COMMON = {
    "reward": [tutorial.REWARD],
    "max_new_tokens": 10,
    "epochs": 4,
    "minibatches": 2,
    "learning_rate": 5e-4,
    "adam_beta2": 0.98,
    "track_kl": True,
    "eval_samples": 4,
    "save_every": 0,
}
ONE_EACH = {"prompts_per_step": 128, "samples_per_prompt": 1}
ONCE = {"epochs": 1, "minibatches": 1}
BARE = {"loss": "reinforce", "baseline": "none", "whiten": False, "kl_coef": 0.0}
VALUE = {**BARE, "baseline": "critic", "critic_learning_rate": 1e-3, "lam": 1.0, "value_clip": None}
ROAD: dict[str, dict[str, Any]] = {
    "reward only": {**ONE_EACH, **BARE},
    "+ value baseline": {**ONE_EACH, **VALUE},
    "+ clipping": {**ONE_EACH, **VALUE, "loss": "ppo"},
    "+ reference KL": {**ONE_EACH, **VALUE, "loss": "ppo", "kl_coef": 0.05},
    "GRPO": {"prompts_per_step": 16, "samples_per_prompt": 8, "kl_coef": 0.05},
    "reward only, once a step": {**ONE_EACH, **BARE, **ONCE},
    "+ value baseline, once a step": {**ONE_EACH, **VALUE, **ONCE},
}
PANELS = {
    "reward": "mean reward of the batch",
    "reward_variance": "variance of the reward in the batch",
    "kl": "KL from the initial model, nats a token",
    "update_size": "update size: |change of the weights|",
}


class Measured(runs.Run):
    """Adds to a step's numbers the variance of the rewards and how far the weights moved."""

    model: torch.nn.Module

    def total_rewards(self, *inputs: Any) -> tuple[Tensor, dict[str, float]]:
        result = super().total_rewards(*inputs)  # type: ignore[misc]
        self.rewards_seen = result[0]
        return result

    def step(self, step: int) -> dict[str, float]:
        before = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()
        numbers = super().step(step)  # type: ignore[safe-super]
        after = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()
        return numbers | {"reward_variance": self.rewards_seen.var().item(), "update_size": (after - before).norm().item()}


class MeasuredPPO(Measured, PPO):
    pass


class MeasuredGRPO(Measured, GRPO):
    pass


def travel(directory: Path, seed: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """The log of every run of the road; a run that is there already is not made again."""
    task, logs = directory / f"seed-{seed}" / "task", {}
    tutorial.prepare(task, seed, torch.device("cpu"))
    files = {"model": f"{task}/model", "data": f"{task}/train.jsonl", "eval_data": f"{task}/held_out.jsonl"}
    for i, (name, changes) in enumerate(ROAD.items(), 1):
        output = directory / f"seed-{seed}" / f"{i}-{name.strip('+ ').replace(',', '').replace(' ', '-')}"
        if not (output / "summary.json").exists():
            make, arguments = (MeasuredGRPO, GRPOArguments) if name == "GRPO" else (MeasuredPPO, PPOArguments)
            settings = {**COMMON, **changes, **files, "seed": seed, "steps": steps, "output_dir": str(output), "cpu": True}
            settings["resume"] = (output / "settings.json").exists()
            runs.train(make, arguments(**settings))
        logs[name] = runs.read_metrics(output / "metrics.jsonl")
    return logs


def draw(logs: list[dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Each number over the steps: the mean over the seeds, and its range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name in ROAD:
            curves = [[row[key] for row in log[name][1:]] for log in logs]
            steps = range(1, len(curves[0]) + 1)
            style = "--" if "once" in name else "-"
            axes.plot(steps, [statistics.mean(at) for at in zip(*curves, strict=True)], style, label=name)
            axes.fill_between(steps, [min(at) for at in zip(*curves, strict=True)], [max(at) for at in zip(*curves, strict=True)], alpha=0.12)
        axes.set(title=label, xlabel="step")
        if key == "kl":
            axes.set_yscale("symlog", linthresh=0.5)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def table(logs: list[dict[str, list[dict[str, Any]]]]) -> str:
    """What each run came to, means over the seeds; the held-out reward with its range."""
    lines = ["| | held-out reward | right | steps to 1.6 | variance of the reward | KL at the end | update size |", "|---|---|---|---|---|---|---|"]
    for name in ROAD:
        ends = [log[name][-1]["held_out_reward"] for log in logs]
        right = statistics.mean(log[name][-1]["held_out_accuracy"] for log in logs)
        reached = [next((row["step"] for row in log[name][1:] if row["reward"] >= 1.6), None) for log in logs]
        steps = ", ".join("never" if step is None else str(step) for step in reached)
        late = {key: statistics.mean(row[key] for log in logs for row in log[name][1:][-10:]) for key in ("reward_variance", "kl")}
        size = statistics.mean(row["update_size"] for log in logs for row in log[name][1:])
        held_out = f"{statistics.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"
        lines.append(f"| {name} | {held_out} | {right:.1%} | {steps} | {late['reward_variance']:.3f} | {late['kl']:.2f} | {size:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tutorial"), help="runs that it holds already are not made again")
    given = parser.parse_args()
    logs = [travel(given.output_dir, seed, given.steps) for seed in given.seeds]
    draw(logs, given.output_dir / "tutorial.png")
    before = statistics.mean(log["GRPO"][0]["held_out_reward"] for log in logs)
    print(f"\nheld-out reward before: {before:.2f}\n\n{table(logs)}\n\nfigure: {given.output_dir / 'tutorial.png'}")


if __name__ == "__main__":
    main()
