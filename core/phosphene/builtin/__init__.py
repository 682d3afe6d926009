"""The bundled world: drawn scenes and textures, and the small networks trained on them."""
