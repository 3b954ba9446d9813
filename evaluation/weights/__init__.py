"""Averaging and interpolating the weights of trained models."""
