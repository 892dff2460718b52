"""The measurements that are no ablation: a file and a command each, and a JSON file that the documentation draws."""
