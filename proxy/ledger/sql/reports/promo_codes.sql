-- Promo codes, newest first: the one named $1, or (NULL) $3 of them behind the code $2.
SELECT p.*
  FROM farebox.promo_codes p
 WHERE ($1::text IS NULL OR p.code = $1)
   AND ($2::text IS NULL
        OR (p.created_at, p.code) < (SELECT b.created_at, b.code FROM farebox.promo_codes b WHERE b.code = $2))
 ORDER BY p.created_at DESC, p.code DESC
 LIMIT $3
