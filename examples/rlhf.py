"""Reinforcement learning from human feedback, whole: a warmed-up model, a reward model from preferences, and PPO against that reward model.

    python examples/rlhf.py [--seed N] [--resume]

The task is that of `rlkern grpo` without arguments: sums, for which a teacher gives 0 (wrong), 1 (right) or 2 (right, with the working). PPO never
sees these points. It sees a reward model, which has only seen which of two answers the teacher likes better; the points are for the held-out
questions.
"""

import argparse
import time
from pathlib import Path

from rlkern.trainers import ppo, reward, tutorial
from rlkern.trainers.directories import run_directory

PPO = {**tutorial.PPO_SETTINGS, "kl_coef": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default=None, help="by default the next free runs/rlhf-N")
    parser.add_argument("--resume", action="store_true", help="continue the run in output-dir, by default the latest")
    parser.add_argument("--steps", type=int, default=None, help="of both parts, for a try")
    given = parser.parse_args()
    started = time.perf_counter()
    directory: Path = run_directory(given.output_dir, name="rlhf", resume=given.resume, begun="reward/settings.json")
    common = {"seed": given.seed, "resume": given.resume} | ({"steps": given.steps} if given.steps else {})

    learned = reward.train(reward.RewardArguments(**{**tutorial.REWARD_MODEL_SETTINGS, **common}, output_dir=str(directory / "reward")))
    task, judge = directory / "reward" / "tutorial", str(directory / "reward" / "model")
    files = {"model": f"{task}/model", "data": f"{task}/train.jsonl", "eval_data": f"{task}/held_out.jsonl"}
    arguments = ppo.PPOArguments(
        **{**PPO, **common, "resume": (directory / "ppo" / "settings.json").exists()},
        **files,
        reward=[f"{judge}=0.2"],
        eval_reward=[tutorial.REWARD],
        critic=judge,
        output_dir=str(directory / "ppo"),
    )
    trained = ppo.train(arguments)

    print(f"\nreward model: {learned['after']['accuracy']:.1%} of held-out preferences right ({learned['seconds']:.0f} s with the warm-up)")
    for when in ("before", "after"):
        print(f"held-out questions {when:6} PPO: {trained[when]['reward']:.2f} of 2 points, {trained[when]['accuracy']:.1%} right")
    print(f"{time.perf_counter() - started:.0f} s in all; everything is in {directory}")


if __name__ == "__main__":
    main()
