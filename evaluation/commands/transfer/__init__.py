"""Commands that measure how well encoders and fine-tuned models transfer."""
