"""The table of the page on defenses: success rates of attacks on each input transform."""

from phosphene import load_model, methods
from phosphene.builtin.scenes import draw_scenes

DEFENSES = ("jpeg(quality=75)", "median(size=3)", "bit_depth(bits=3)", "total_variation(weight=0.1)")
MODEL, IMAGES, EPS, STEPS = "builtin:shapes-resnet", 48, 6 / 255, 40


def main() -> None:
    """Print a row for every defense."""
    images = draw_scenes(IMAGES, seed=11).images
    undefended, pgd = load_model(MODEL), methods["pgd"]
    labels = undefended(images).argmax(1).detach()
    attack = {"eps": EPS, "step_size": EPS / 6, "steps": STEPS, "seed": 0}
    examples = pgd(undefended, images, labels, **attack)
    print(f"| none | 100% | | {examples.success.float().mean():.0%} |")
    for name in DEFENSES:
        model = load_model(f"defended:{name}|{MODEL}")
        unchanged = model(images).argmax(1) == labels
        unaware = model(examples.adversarial).argmax(1) != labels
        adaptive = pgd(model, images, labels, **attack).success
        rates = " | ".join(f"{mask.float().mean():.0%}" for mask in (unchanged, unaware, adaptive))
        print(f"| `{name}` | {rates} |", flush=True)


if __name__ == "__main__":
    main()
