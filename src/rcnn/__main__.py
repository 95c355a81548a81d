"""`python -m rcnn`, for launchers that start a module: torchrun -m rcnn train ..."""

from rcnn.cli.main import main

main()
