"""Recipes: scripts for `accelerate launch`, in a wheel the modules `genie_diffusers.recipes`."""
