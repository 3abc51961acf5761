"""The network benchmark's task in plain Flower: its FedAvg, float32 both ways."""
