"""A job that looks whether one of the texts it is given, backwards, is in what Ray's head node keeps."""

import sys

import ray
from ray.experimental import internal_kv

ray.init(log_to_driver=False)
kept = [internal_kv._internal_kv_get(key) or b"" for key in internal_kv._internal_kv_list(b"")]
packages = internal_kv._internal_kv_list(b"gcs://")
found = [one for one in kept for secret in sys.argv[1:] if secret[::-1].encode() in one]
print(f"packages: {len(packages)} of {len(kept)} keys, with a secret: {len(found)}")
