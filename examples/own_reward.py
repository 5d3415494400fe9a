"""
A reward of your own: a function with these two arguments, in any file.

    python train.py --rewards examples/own_reward.py:redness
    python train.py --rewards preference,examples/own_reward.py:redness --reward_weights 2,1
    python eval.py --scorers examples/own_reward.py:redness --checkpoint out/tiny/checkpoint-50

`images` is a float tensor (G, 3, H, W) in [0, 1] on the run's device; `prompts` is a list of G
strings. Return one finite number for each image, in a tensor (G,), a list or an array. Higher is
better. Nothing is differentiated, so the numbers may come from any program.

The log and the tables use the function's name. If you change this file, --resume refuses to
continue the run. A reward that needs weights can load them at the top of the file, which runs once.
Or it can be a subclass of rewards.Scorer, which also gets the text after "=" in `--rewards
FILE.py:CLASS=text`: see package_rewards.py.
"""


def redness(images, prompts):
    """How red a picture is: red minus the mean of green and blue, from -1 to 1. Grey has 0."""
    red, green, blue = images.unbind(1)                                 # (G, H, W) each
    return (red - (green + blue) / 2).mean((1, 2))                      # (G,)
