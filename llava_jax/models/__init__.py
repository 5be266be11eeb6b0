"""The networks: CLIP vision tower, projector, LLaMA decoder, and their composition by `image_slots`.

Dimension letters, the same in every signature and einsum of this package:
  B rows, T tokens of a row, S slots of a cache, D model width, F mlp width, N query heads, K key/value heads,
  H head width, V vocabulary, L layers, G groups of rows, I images of a group, P patches of an image (with the
  class token where noted), C vision width.
A model knows no loss, no optimizer, no mesh and no string.
"""
