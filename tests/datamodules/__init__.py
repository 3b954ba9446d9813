"""Tests of datamodules."""
