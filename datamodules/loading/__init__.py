"""From a file to a batch: decoding, caching, transforms, sampling."""
