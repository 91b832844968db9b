#!/bin/bash
# LocalStack runs this once it serves requests. Its memory is empty then, so the bucket is never there before.
awslocal s3api create-bucket --bucket checkpoints
