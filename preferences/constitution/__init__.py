"""Constitutional AI (Bai et al. 2022b): critiques, revisions and choices under written principles make the pairs."""
