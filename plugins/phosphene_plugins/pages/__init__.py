"""What our pages share: their look, a result's pictures in them, and writing them whole."""
