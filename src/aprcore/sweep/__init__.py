"""Many runs as one resumable list of jobs, here or on a cluster, and where they differ."""
