"""What real devices speak with: the protocol, identities, fleet decisions, and the service that answers them."""
