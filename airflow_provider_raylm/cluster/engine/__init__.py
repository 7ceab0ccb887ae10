"""The control side: engines come, are looked at, and go. Nothing else deploys, inspects or deletes applications."""
