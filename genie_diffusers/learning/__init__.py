"""
What is learned for, of and from diffusion models: the parts of the recipes in `training/`, for scripts of one's own.

It needs the extra `train`, so nothing else of the package imports it.
"""
