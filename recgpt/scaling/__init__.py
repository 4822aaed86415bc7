"""What training costs on machines that one has, and on those that one has not."""
