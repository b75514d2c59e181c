"""What each process of the elastic tests runs: a cross-validation that saves at every step and takes its time.

Arguments: configuration, seconds that each step takes longer, and the step after which to stop (0: none).
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from cfusion.config import load_config
from cfusion.errors import CfusionError
from cfusion.runs.crossval import cross_validate
from cfusion.training import checkpoint, loop

torch.set_num_threads(1)
checkpoint.INTERVAL_SECONDS = -1.0
config, pause, stop_at = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
asked = loop.stop_requested
steps = 0


def stop_requested() -> bool:
    global steps
    steps += 1
    time.sleep(pause)
    if steps == stop_at:
        os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler would, to the node's agent
        return True
    return asked()


loop.stop_requested = stop_requested
try:
    cross_validate(load_config(config))
except CfusionError as error:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)
