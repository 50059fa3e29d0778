"""What commands print on the console, and how runs get into dashboards."""
