"""The numbers of the page on defenses about margins: certified radii, and success rates of PGD."""

from typing import Any

from phosphene import load_model, methods, run
from phosphene.builtin.scenes import draw_scenes

RECIPE: dict[str, Any] = {"eps": 1e-3, "steps": 150, "batch": 16, "held_out": 0.125}
ATTACK: dict[str, Any] = {"eps": 0.3, "norm": "l2", "step_size": 0.075, "steps": 10}


def main() -> None:
    """Train a network for its margins, and evaluate it and the one that it was trained from."""
    test = draw_scenes(64, split="test", start=50_000)
    model = load_model("builtin:shapes-vgg")
    trained = run("lipschitz_fit", model=model, dataset="builtin:scenes/256", **RECIPE, seed=0).model()
    for classifier in (model, trained):
        proven = methods["lipschitz"](classifier, test.images)
        accuracy = proven.labels.eq(test.labels).float().mean()
        changed = (
            methods["pgd"](classifier, test.images, proven.labels, **ATTACK, seed=0).success.float().mean()
        )
        rates = f"accuracy {accuracy:.0%}, predictions that PGD changes {changed:.0%}"
        print(f"{proven.subject}, median radius {proven.radius.median():.1g}, {rates}", flush=True)


if __name__ == "__main__":
    main()
