"""Common words of things that images show: colors, textures, materials, parts, animals, objects, scenes."""

from __future__ import annotations

_TEXT = """
red orange yellow green blue purple pink brown black white gray gold silver beige turquoise dark bright pale
striped spotted dotted checkered woven knitted wrinkled cracked bumpy smooth shiny rough grid honeycomb
spiral zigzag wavy swirly fuzzy furry feathered scaly grainy blurry transparent reflective stained rusty wet
dry wood metal glass stone brick concrete sand snow ice water fire smoke cloud fog fabric leather paper
plastic fur wool skin hair marble clay soil grass moss leaf bark circle square triangle star line curve
corner edge cross arrow ring heart stripe text letter number logo symbol eye ear nose mouth face head hand
finger arm leg foot wing tail beak paw horn feather fin shell wheel window door handle button screen
keyboard lamp mirror frame chain rope wire pipe net fence ladder roof dog cat horse cow sheep pig goat
rabbit mouse bear lion tiger elephant giraffe zebra monkey deer fox wolf bird duck chicken eagle owl parrot
penguin fish shark whale dolphin frog snake lizard turtle insect butterfly bee spider ant snail crab octopus
jellyfish coral person man woman child baby crowd soldier player rider swimmer musician tree flower rose
palm bush forest cactus mushroom fruit apple banana lemon grape strawberry pumpkin tomato carrot cabbage
corn pepper bread cake pizza sandwich meat cheese egg soup salad coffee wine bottle cup plate bowl spoon
knife fork pan car truck bus train bicycle motorcycle airplane helicopter boat ship rocket tractor chair
table sofa bed desk shelf cabinet carpet curtain pillow blanket clock vase book box bag basket bucket
umbrella hat shirt dress trousers shoe sock glove tie belt glasses helmet mask necklace watch phone camera
computer television radio guitar piano drum violin trumpet ball racket bat ski surfboard skateboard hammer
saw scissors needle pen pencil brush broom key lock gun sword flag balloon toy doll kite house building
tower bridge church castle skyscraper barn tent street road sidewalk railway tunnel stairs kitchen bathroom
bedroom office classroom library shop restaurant stadium gym airport station garage sky sun moon sunset
night rain rainbow lightning mountain hill valley canyon desert beach ocean lake river waterfall island
field garden park farm path cave sport game music party wedding parade war winter summer autumn spring
underwater aerial indoor outdoor
"""

#: The words.
COMMON_WORDS: tuple[str, ...] = tuple(_TEXT.split())
