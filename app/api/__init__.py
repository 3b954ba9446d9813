"""``vitrail serve``: a trained model as an HTTP API."""
