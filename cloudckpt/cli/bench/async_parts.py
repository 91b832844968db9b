"""What `cloudckpt bench-async` can measure, by name. Pure."""

BLOCKING = "async-blocking"
TRAINING = "async-training"
RANKS = "async-ranks"
