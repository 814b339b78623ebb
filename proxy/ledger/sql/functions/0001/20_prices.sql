-- Price versions: put once, content-addressed, and what a usage costs under one.

-- One rounding, up to the next microcredit. Seven products of numbers below 2^30 fit 64 bits; larger ones, which are
-- rare and take longer, go by numeric.
CREATE FUNCTION farebox.charge_at(_rates bigint[], _per_request bigint, _usage bigint[]) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN 1073741824 > ALL (_rates) AND 1073741824 > ALL (_usage) THEN (
            _per_request + (
                _rates[1] * _usage[1] + _rates[2] * _usage[2] + _rates[3] * _usage[3] + _rates[4] * _usage[4]
                + _rates[5] * _usage[5] + _rates[6] * _usage[6] + _rates[7] * _usage[7] + 999999
            ) / 1000000
        )::numeric
        ELSE _per_request + div(
            _rates[1]::numeric * _usage[1] + _rates[2]::numeric * _usage[2] + _rates[3]::numeric * _usage[3]
            + _rates[4]::numeric * _usage[4] + _rates[5]::numeric * _usage[5] + _rates[6]::numeric * _usage[6]
            + _rates[7]::numeric * _usage[7] + 999999,
            1000000
        )
    END
$$;

-- NULL where that version has no such row.
CREATE FUNCTION farebox.charge_for(_version text, _model text, _variant text, _usage bigint[]) RETURNS numeric
LANGUAGE sql STABLE AS $$
    SELECT farebox.charge_at(p.rates, p.per_request, _usage)
      FROM farebox.prices p
     WHERE p.version = _version AND p.model = _model AND p.variant = _variant
$$;

-- The price rows that a body says: the one place that knows the body's shape.
CREATE FUNCTION farebox.price_rows(_body text)
RETURNS TABLE (model text, variant text, rates bigint[], per_request bigint)
LANGUAGE sql IMMUTABLE AS $$
    SELECT route.key, priced.key,
           ARRAY(SELECT r.value::bigint
                   FROM jsonb_array_elements_text(priced.value -> 'rates') WITH ORDINALITY AS r (value, position)
                  ORDER BY r.position),
           (priced.value ->> 'per_request')::bigint
      FROM jsonb_each(_body::jsonb -> 'routes') AS route,
           jsonb_each(route.value -> 'variants') AS priced
$$;

-- True if the version is new. RAISEs where _version isn't the body's SHA-256.
CREATE FUNCTION farebox.put_price_version(_version text, _body text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF encode(sha256(convert_to(_body, 'UTF8')), 'hex') IS DISTINCT FROM _version THEN
        RAISE EXCEPTION 'price version % is not the SHA-256 of its body', left(_version, 64) USING ERRCODE = '22023';
    END IF;
    INSERT INTO farebox.price_versions (version, body) VALUES (_version, _body) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO farebox.prices (version, model, variant, rates, per_request)
    SELECT _version, r.model, r.variant, r.rates, r.per_request FROM farebox.price_rows(_body) AS r;
    RETURN true;
END
$$;
