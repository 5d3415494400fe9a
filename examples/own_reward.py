def redness(images, prompts):
    r, g, b = images.unbind(1)
    return (r - (g + b) / 2).mean((1, 2))
