"""The bundled images and networks: drawn scenes and textures, and small networks trained on them."""
