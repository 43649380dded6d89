"""Device meshes and the one table that says how arrays are laid out on them."""
