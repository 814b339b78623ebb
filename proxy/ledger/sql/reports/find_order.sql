-- The order that is called $1, or $2 at Stripe: its PaymentIntent, Checkout Session or invoice.
SELECT o.*
  FROM farebox.orders o
 WHERE o.id = $1 OR o.payment_intent = $2 OR o.session_id = $2 OR o.invoice = $2
