"""What tests share: the application, daemons, endpoints, PostgreSQL and the network between
them."""
