"""What pushes models back to devices: deltas, signed repository, staged rollout.

- `repository` (with `roles`, `keys`, `files`, `catalogue`, `release`) is a repository of The Update Framework, `audit` checks one.
- `client` (with `fetch`) reads one on a device, `install` (with `slots`, `disk`) switches models there, `assignment` says which.
- `rollout` (with `confidence`, `rollout_record`, `journal`) decides who gets a release and whether it goes on; `compare` is A/B.
- `delta` (with `frames`, `planes`) makes files from files that are there.
"""
