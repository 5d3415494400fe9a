"""
Run a script that ends when its stdin is closed, as after Ctrl-C: with a checkpoint; or without one
if that takes more than two minutes. paper/jobs.py holds the other end of the pipe. So if it is
killed, by whatever means, its runs do not go on alone.

    python -m paper.leash train.py --iterations 5       # or: -m paper.baselines --method dance
"""
import os, runpy, signal, sys, threading, time

def wait():
    os.read(0, 1)                               # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(120)
    os._exit(1)

if __name__ == "__main__":
    threading.Thread(target=wait, daemon=True).start()
    is_module = sys.argv[1] == "-m"
    sys.argv = sys.argv[1 + is_module :]
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
