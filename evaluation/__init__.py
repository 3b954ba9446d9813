"""What the numbers of a run mean: predictions on disk, statistics with intervals, class reports, figures, baselines.

``python -m evaluation summary runs/…`` prints the table that the README shows; ``python -m evaluation linear-probe``
measures the floor that a trained model has to beat; ``base-to-novel`` and ``wise-ft`` tell what fine-tuning cost and
how to get it back; ``soup`` averages several fine-tunings. Modules here read files and arrays and never train a
network.
"""

from __future__ import annotations
