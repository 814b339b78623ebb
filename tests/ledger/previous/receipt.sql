-- The hold $1, with the price rows that its charge was computed from.
SELECT h.*, p.rates, p.per_request
  FROM farebox.holds h
  LEFT JOIN farebox.prices p ON p.version = h.price_version AND p.model = h.model AND p.variant = h.variant
 WHERE h.id = $1
