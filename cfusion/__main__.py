"""`python -m cfusion`, which `torchrun -m cfusion` needs."""

from cfusion.cli.main import run

run()
