"""`python -m cfusion`, which `torchrun -m cfusion` needs."""

from cfusion.child_processes import forget_working_folder

forget_working_folder()

from cfusion.cli.main import run  # noqa: E402 - imports from the working folder until here

run()
