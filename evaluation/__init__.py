"""Evaluation of runs and data sets: statistics with intervals, tables, reports, saliency maps, cost."""
