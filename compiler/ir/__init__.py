"""The intermediate representation: factors, sharded graphs, their verifier and printer."""
