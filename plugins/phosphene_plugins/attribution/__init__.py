"""Attribution: maps of the pixels or positions that a target depends on."""
