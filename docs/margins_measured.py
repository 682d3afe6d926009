"""What the page on defences says of margins that were learned: radii that are proven, and what PGD finds."""

from typing import Any

from phosphene import load_model, methods, run
from phosphene.builtin.scenes import draw_scenes

RECIPE: dict[str, Any] = {"eps": 1e-3, "steps": 150, "batch": 16, "held_out": 0.125}
ATTACK: dict[str, Any] = {"eps": 0.3, "norm": "l2", "step_size": 0.075, "steps": 10}


def main() -> None:
    """Train a network for its margins, and look at it and the one it was made from."""
    seen = draw_scenes(64, split="test", start=50_000)
    model = load_model("builtin:shapes-vgg")
    trained = run("lipschitz_fit", model=model, dataset="builtin:scenes/256", **RECIPE, seed=0).model()
    for victim in (model, trained):
        proven = methods["lipschitz"](victim, seen.images)
        right = proven.labels.eq(seen.labels).float().mean()
        changed = methods["pgd"](victim, seen.images, proven.labels, **ATTACK, seed=0).success.float().mean()
        shares = f"right {right:.0%}, answers that PGD changes {changed:.0%}"
        print(f"{proven.subject}, median radius {proven.radius.median():.1g}, {shares}", flush=True)


if __name__ == "__main__":
    main()
