"""The conformance kit, with every promise that top_classes makes."""

from phosphene.testing import parametrize_with_checks


@parametrize_with_checks(["top_classes"], profile="quick")
def test_it_keeps_its_promises(check):
    check()
