"""Trains a small network with a checkpoint at every step, written by a thread; a process of a test that kills it."""

import sys
import time
from pathlib import Path

import cfusion.training.checkpoint as checkpoint
from cfusion.training import checkpoint_files

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from test_checkpoint import Training

    checkpoint.INTERVAL_SECONDS = -1.0
    write = checkpoint_files._write_tensors

    def slowly(path: Path, pieces) -> str:
        """Write half of the file, wait, then write all of it: a kill falls into the writing."""
        path.write_bytes(b"half")
        time.sleep(0.02)
        return write(path, pieces)

    checkpoint_files._write_tensors = slowly
    training = Training(Path(sys.argv[1]), background=True)
    training.load()
    with training.checkpoints.settling():
        while training.state.step < int(sys.argv[2]):
            training.step()
            training.save(now=False)
            time.sleep(0.005)
    print(training.state.step, flush=True)
