"""References that several methods of the family name."""

from phosphene import Reference

SIMONYAN_2014 = Reference(
    key="simonyan2014",
    title="Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps",
    authors="Simonyan, Vedaldi, Zisserman",
    year=2014,
    url="https://arxiv.org/abs/1312.6034",
)

ZEILER_2014 = Reference(
    key="zeiler2014",
    title="Visualizing and Understanding Convolutional Networks",
    authors="Zeiler, Fergus",
    year=2014,
    url="https://arxiv.org/abs/1311.2901",
)
