"""Methods that are learned: gradients through a layer or a block choose roundings, scales, codebooks or norms."""
