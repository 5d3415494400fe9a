"""
A reward of your own: any function with these two arguments, in a file of yours.

    python train.py --rewards examples/own_reward.py:redness
    python train.py --rewards clip,examples/own_reward.py:redness --reward_weights 2,1
    python eval.py --scorers examples/own_reward.py:redness --checkpoint out/tiny/checkpoint-150

`images` is a float tensor (G, 3, H, W) in [0, 1] on the run's device; `prompts` is a list of G
strings. Return a finite number for each image, higher for better: a tensor (G,), a list or an
array. Nothing is differentiated, so the numbers may come from any program.

The function's name is its name in the log and in the tables. If this file changes, --resume refuses
to go on. A reward that needs weights can load them at the top of the file, which runs once. Or it
can be a subclass of rewards.Scorer, which is also given what follows "=": see package_rewards.py.
"""


def redness(images, prompts):
    """How red a picture is: red, less the mean of green and blue; -1 to 1, and 0 for greys."""
    red, green, blue = images.unbind(1)                                 # (G, H, W) each
    return (red - (green + blue) / 2).mean((1, 2))                      # (G,)
