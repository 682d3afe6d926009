"""The table of the page on defences: how often attacks get past each input transform."""

from phosphene import load_model, methods
from phosphene.builtin.scenes import draw_scenes

DEFENSES = ("jpeg(quality=75)", "median(size=3)", "bit_depth(bits=3)", "total_variation(weight=0.1)")
MODEL, PICTURES, EPS, STEPS = "builtin:shapes-resnet", 48, 6 / 255, 40


def main() -> None:
    """Print a row for every defence."""
    images = draw_scenes(PICTURES, seed=11).images
    plain, pgd = load_model(MODEL), methods["pgd"]
    labels = plain(images).argmax(1).detach()
    attack = {"eps": EPS, "step_size": EPS / 6, "steps": STEPS, "seed": 0}
    found = pgd(plain, images, labels, **attack)
    print(f"| none | 100% | | {found.success.float().mean():.0%} |")
    for name in DEFENSES:
        model = load_model(f"defended:{name}|{MODEL}")
        kept, unaware = model(images).argmax(1) == labels, model(found.adversarial).argmax(1) != labels
        adaptive = pgd(model, images, labels, **attack).success
        shares = " | ".join(f"{share.float().mean():.0%}" for share in (kept, unaware, adaptive))
        print(f"| `{name}` | {shares} |", flush=True)


if __name__ == "__main__":
    main()
