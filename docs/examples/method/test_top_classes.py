"""The conformance kit on top_classes."""

from phosphene.testing import parametrize_with_checks


@parametrize_with_checks(["top_classes"], profile="quick")
def test_conformance(check):
    check()
